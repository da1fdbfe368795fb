"""Measures a server with `voxtral_client`: live streams and their lag (`benchmark`), word error rate (`evaluate`)."""
