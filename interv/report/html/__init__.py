"""Pages of HTML that stand alone, made from files: no torch, no model, no network."""
