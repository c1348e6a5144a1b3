"""What the page shows of a reply, in HTML: cards, panels, a page to share. Knows replies and what was seen inside; asks no model."""
