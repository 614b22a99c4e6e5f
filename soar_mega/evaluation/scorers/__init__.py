"""Published scores of pictures, one file each; ``make.py`` makes them by name."""
