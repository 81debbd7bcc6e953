"""Reports on recorded runs: statistics, tables, plots and the files of a report."""
