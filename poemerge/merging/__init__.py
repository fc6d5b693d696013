"""The way of a merge: plan, load, apply, write, all tensor by tensor."""
