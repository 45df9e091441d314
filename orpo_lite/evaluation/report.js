"use strict";
// Replaces the page's content during the run. Open parts, focus and scroll position are kept.
let version = "";
async function follow() {
  try {
    const answer = await fetch("/body?version=" + version, { cache: "no-store" });
    if (answer.status === 200) {
      version = answer.headers.get("X-Version");
      const place = document.getElementById("live");
      const open = [...place.querySelectorAll("details[open]")].map((part) => part.id);
      const focused = document.activeElement && document.activeElement.closest("details");
      const x = window.scrollX, y = window.scrollY;
      place.innerHTML = await answer.text();
      for (const id of open) {
        const part = document.getElementById(id);
        if (part) part.open = true;
      }
      if (focused && document.getElementById(focused.id)) {
        document.getElementById(focused.id).querySelector("summary").focus({ preventScroll: true });
      }
      window.scrollTo(x, y);
    }
  } catch {
    // The server has stopped. The page does not change.
  }
  setTimeout(follow, 3000);
}
setTimeout(follow, 3000);
