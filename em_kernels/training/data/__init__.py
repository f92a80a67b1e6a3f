"""Problems, and whether an answer is right."""
