"""The harness: data sets, preprocessing, LoadGen runs, accuracy and reports."""
