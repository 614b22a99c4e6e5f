"""Does a picture show what its caption says? Scorers and reports."""
