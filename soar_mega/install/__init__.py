"""What to install where torch is there already; imported before anything is installed."""
