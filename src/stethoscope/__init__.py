"""Find the layers where a fine-tune's skill lives, edit those only, and prove gain and cost."""
