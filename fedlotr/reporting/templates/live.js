"use strict";
// What has changed is put in place of what is shown; tables that are open stay open.
async function again() {
  const header = document.querySelector("header");
  try {
    const answer = await fetch(location.pathname, { cache: "no-store" });
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const details of next.querySelectorAll("figure details")) {
      const shown = document.getElementById(details.closest("figure").id)?.querySelector("details");
      if (shown) details.open = shown.open;
    }
    for (const part of ["header", "nav", "main"]) {
      const [now, then] = [document, next].map((page) => page.querySelector(part));
      if (!now.isEqualNode(then)) now.replaceWith(then);
    }
    document.title = next.title;
  } catch {
    if (!document.getElementById("silent")) {
      const said = document.createElement("p");
      said.id = "silent";
      said.className = "warning";
      said.textContent = "fedlotr watch does not answer: this is as it was.";
      header.append(said);
    }
  }
  setTimeout(again, {{ every }} * 1000);
}
setTimeout(again, {{ every }} * 1000);
