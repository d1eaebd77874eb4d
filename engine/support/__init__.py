"""What any room of the project may need: files, progress, the environment, how a command ends."""
