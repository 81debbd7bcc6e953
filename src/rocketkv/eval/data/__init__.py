"""Texts to measure on: files of data sets, samples, documents and how a sample is asked."""
