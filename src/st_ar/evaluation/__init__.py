"""What a model understands and how well it draws: probes, attention, distances between sets of images."""
