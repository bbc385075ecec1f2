"""Measures of a model: greedy answers, exact match, preference accuracy, bits per byte."""
