"""Images on disk, COCO annotations, and which detections are the same."""
