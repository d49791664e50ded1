"""Rankings from the votes of a question-and-answer site."""
