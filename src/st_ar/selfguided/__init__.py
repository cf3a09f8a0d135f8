"""Self-guided training (ST-AR, arXiv 2509.15185): key masks, losses, teacher, and the objective that joins them."""
