"""Pages that people read: a cascade, its derivation, its costs and its kernel."""
