"""Pre-trained backbones with a head per task, and their layer groups."""
