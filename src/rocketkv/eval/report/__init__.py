"""Reports on recorded runs: statistics, tables, plots and the files that hold them."""
