"""Forward passes of the model, and the evidence that a method reads from them."""
