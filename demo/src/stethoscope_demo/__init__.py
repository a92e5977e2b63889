"""The embedded recipe's base model, tuned sibling, SAEs and tasks."""
