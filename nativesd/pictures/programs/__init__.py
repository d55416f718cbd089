"""What each program writes about its pictures, read into the options that make them again."""
