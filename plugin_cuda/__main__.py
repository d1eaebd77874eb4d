"""``python -m plugin_cuda``."""

from plugin_cuda.cli import main

main()
