"""Rewards over HTTP: the server's parts, its client, judges. No reward of our own."""
