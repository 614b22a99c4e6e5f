"""SOAR against SFT on the benchmark ``handwriting``: runs, scores, tables and plots."""
