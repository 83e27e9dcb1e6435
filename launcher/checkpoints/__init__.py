"""Checkpoints as folders and files: manifests, the commit protocol, verification, retention. No torch here."""
