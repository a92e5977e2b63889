"""What a run saves, each type once, with its frame, picture, table and verdict; no model library is needed."""
