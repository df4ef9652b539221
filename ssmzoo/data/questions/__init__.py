"""Questions about pictures: digits that scikit-learn ships, or a folder of one's own."""
