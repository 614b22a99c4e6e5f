"""The benchmark ``handwriting``: pages of digits with exact truth, read back from their pixels."""
