"""A model on a Triton server: the client, the model that the server runs, what both agree on."""
