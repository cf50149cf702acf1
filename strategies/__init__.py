"""Server strategies, one file each, over the same public interface that a user's own strategy has."""
