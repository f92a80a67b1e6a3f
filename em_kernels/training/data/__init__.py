"""Problems, and grading of answers."""
