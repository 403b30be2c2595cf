"""Converted checkpoints: Orbax arrays with a manifest, written by ``convert`` and restored onto a mesh."""
