"""Scripts that wire everything together: one file a kind of run."""
