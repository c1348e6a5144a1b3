"""What the slots hold and whether they matter. Reads what thinking left behind; knows neither models nor pages."""
