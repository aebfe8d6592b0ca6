"""The draft worker actor and what drafts in it."""
