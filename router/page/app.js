// The page as a whole: which view is shown, the theme, who is signed in.
import { ask, enter } from "./api.js";
import { redraw, start } from "./live.js";
import { open } from "./playground.js";

const views = ["live", "playground"];

function show() {
  const wanted = location.hash.slice(1);
  const view = views.includes(wanted) ? wanted : "live";
  for (const name of views) {
    document.getElementById(name).hidden = name !== view;
    const tab = document.getElementById(`tab-${name}`);
    if (name === view) tab.setAttribute("aria-current", "page"); else tab.removeAttribute("aria-current");
  }
  document.getElementById("span").hidden = view !== "live";
  if (view === "playground") open(); else redraw();
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("manta-theme", root.dataset.theme); } catch { /* storage is off */ }
  redraw(true);
});
document.getElementById("logout").addEventListener("click", async () => {
  await ask("dashboard/logout", { method: "POST" });
  location.reload();
});
if (matchMedia("(max-width: 760px)").matches) document.getElementById("options").open = false;
addEventListener("hashchange", show);
document.getElementById("logout").hidden = !await enter();
start();
show();
