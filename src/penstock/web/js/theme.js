// Runs before anything is painted, so that a chosen theme does not flash. Not a module for that reason.
"use strict";
try {
  const chosen = localStorage.getItem("penstock.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is closed to this page: the system's theme it is.
}
