"""The paper's experiments on the demo corpus, as commands that anyone can repeat."""
