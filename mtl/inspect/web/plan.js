"use strict";
// A touch on a part of a bar says what it is: titles alone do not show on a phone.
document.querySelectorAll(".bar").forEach((bar) => {
  const said = document.createElement("p");
  said.className = "note";
  bar.after(said);
  bar.querySelectorAll("i").forEach((part) => part.addEventListener("pointerenter", () => { said.textContent = part.title; }));
});
