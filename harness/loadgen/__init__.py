"""One LoadGen test: settings, SUT, QSL, logs."""
