"""The training loop's side: a rule attached to an optimizer, folded into its step, or joined with a loss scale."""
