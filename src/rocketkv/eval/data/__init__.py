"""Texts to measure on: the files of data sets, samples, documents, and how a sample is asked."""
