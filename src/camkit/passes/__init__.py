"""Forward passes of the model, and the evidence that they give a method."""
