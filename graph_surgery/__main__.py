"""``python -m graph_surgery``."""

from graph_surgery.cli import main

main()
