"""Experts in other places than a checkpoint has them: renumbered by a placement, or stacked over all layers
to be offloaded."""
