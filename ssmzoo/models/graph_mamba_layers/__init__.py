"""What Graph-Mamba alone needs: orders of the nodes, and the scan along them."""
