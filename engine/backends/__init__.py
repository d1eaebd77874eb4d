"""One module per backend; each implements `engine.protocol.Engine`."""
