// Requests to the server that this page is from. The key is never here: a cookie, which no script
// can read, stands for it.
const login = document.getElementById("login");
let entered = null; // while the login is open: what those wait for who were refused

export async function ask(path, options = {}) {
  for (;;) {
    const answer = await fetch(path, { credentials: "same-origin", ...options });
    if (answer.status !== 401) return answer;
    await signIn();
  }
}

// Sign in if that is needed, once the server can say so; whether it ever is.
export async function enter() {
  for (;;) {
    try {
      const session = await (await fetch("dashboard/session", { credentials: "same-origin" })).json();
      if (!session.signed_in) await signIn();
      return session.guarded;
    } catch { await new Promise((done) => setTimeout(done, 2000)); }
  }
}

export const post = (path, body, signal) =>
  ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });

export async function problem(answer) {
  try { return (await answer.json()).error.message; } catch { return `the server answered ${answer.status}`; }
}

function signIn() {
  if (!entered) {
    entered = {};
    entered.promise = new Promise((done) => { entered.done = done; });
    login.showModal();
  }
  return entered.promise;
}

login.addEventListener("cancel", (event) => event.preventDefault());
document.getElementById("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = document.getElementById("key"), error = document.getElementById("login-error");
  error.textContent = "";
  try {
    const answer = await fetch("dashboard/login", {
      method: "POST", credentials: "same-origin", headers: { "content-type": "application/json" },
      body: JSON.stringify({ key: field.value }),
    });
    if (!answer.ok) { error.textContent = await problem(answer); return; }
  } catch { error.textContent = "no answer from the server"; return; }
  field.value = "";
  login.close();
  entered.done();
  entered = null;
});
