/*
 * When to ask the server, and asking it.
 *
 * Problem: a panel that asks all day keeps laptops awake and fills logs; one that asks too seldom shows yesterday's figures. So: once a
 * second while somebody can see the panel and something is going on, once when it comes into sight, once when a job ends, else no request
 * and no timer. What is in flight when the panel goes out of sight is given up.
 *
 * Invariants: at most one request for the status at a time, and one for the timeline; a failed one is told (`onAnswer`) and tried again
 * after 1, 2, 4 ... 30 seconds, only in sight. A 404 is an answer - no extension there - and is not asked again until there is a reason.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    ours.POLL_MS = 1000;
    ours.TIMELINE_MS = 5000;
    ours.TIMEOUT_MS = 20000; // a busy WebUI answers late: its threads share one interpreter lock with the sampling
    ours.MOST_BACKOFF_MS = 30000;

    /** Ask for JSON. {ok, status, json}; status 0: no answer. Never throws, but for AbortError when `signal` says so. */
    ours.request = async function(path, options, signal) {
        const control = new AbortController();
        const abort = () => control.abort();
        if (signal) signal.addEventListener("abort", abort);
        const timer = setTimeout(abort, ours.TIMEOUT_MS);
        try {
            const answer = await fetch(ours.address(path), {cache: "no-store", ...options, signal: control.signal});
            let json = null;
            try {
                json = await answer.json();
            } catch (error) {
                if (error.name === "AbortError") throw error;
                json = null; // a proxy's error page
            }
            const usable = json !== null && typeof json === "object" && !Array.isArray(json);
            return {ok: answer.ok && usable, status: answer.status, json: usable ? json : null};
        } catch (error) {
            if (signal && signal.aborted) throw error;
            return {ok: false, status: 0, json: null};
        } finally {
            clearTimeout(timer);
            if (signal) signal.removeEventListener("abort", abort);
        }
    };

    /** Ask again and again: `path` every `period` ms while `wanted()`, each answer to `onAnswer`; `wake()` asks now. */
    function asker(path, period, wanted, inSight, onAnswer) {
        let timer = null, inFlight = null, failures = 0, again = false;

        function stop() {
            clearTimeout(timer);
            timer = null;
            again = false;
            if (inFlight) inFlight.abort();
            inFlight = null;
        }

        function later() {
            clearTimeout(timer);
            timer = null;
            if (!inSight()) return;
            const backoff = Math.min(ours.MOST_BACKOFF_MS, period * 2 ** (failures - 1));
            if (failures) timer = setTimeout(ask, Math.max(period, backoff));
            else if (wanted()) timer = setTimeout(ask, period);
        }

        /** Only called when nothing is on its way: by wake(), and by a timer, which is set after an answer. */
        async function ask() {
            clearTimeout(timer);
            timer = null;
            if (!inSight()) return;
            const mine = new AbortController();
            inFlight = mine;
            let answer = null;
            try {
                answer = await ours.request(path, {}, mine.signal);
            } catch {
                return; // given up by stop(), which has cleared up
            }
            if (inFlight !== mine) return;
            inFlight = null;
            failures = answer.ok || answer.status === 404 ? 0 : failures + 1;
            onAnswer(answer);
            if (again) {
                again = false;
                ask();
            } else {
                later();
            }
        }

        return {
            stop,
            /** Now, or right after the answer that is on its way (which may be older than the reason to ask). */
            wake() {
                if (inFlight) again = true;
                else ask();
            },
            /** See that it goes on: nothing is asked at once. */
            resume() {
                if (!timer && !inFlight) later();
            },
            /** What is on its way still comes; nothing after it. */
            rest() {
                clearTimeout(timer);
                timer = null;
            },
            get asking() {
                return inFlight !== null;
            },
            get waiting() {
                return timer !== null;
            },
        };
    }

    /**
     * The panel's view of the server. `hear(what)` is called after each change of: `status` (JSON or null), `problem` ("" | "missing" |
     * "unreachable"), `code` (HTTP status, 0: no answer), `timeline`.
     */
    ours.makeClient = function(hear) {
        const model = {status: null, problem: "", code: null, timeline: null, busy: false};
        let sight = false, job = false, open = false;

        const trial = () => (model.status && model.status.trial) || {};
        const trying = () => ["waiting", "running"].includes(trial().state);
        // A server that does not know the extension has nothing to say for as long as a job lasts.
        const busy = () => model.problem !== "missing" && (job || Boolean(model.status && (model.status.generating || trying())));
        const statusAsker = asker("status", ours.POLL_MS, busy, () => sight, (answer) => {
            model.code = answer.status;
            if (answer.ok) {
                model.status = answer.json;
                model.problem = "";
            } else {
                model.problem = answer.status === 404 ? "missing" : "unreachable";
            }
            model.busy = busy();
            hear("status");
            if (model.busy && open) timelineAsker.resume();
            else timelineAsker.rest();
        });
        const timelineWanted = () => open && busy();
        const timelineAsker = asker("timeline", ours.TIMELINE_MS, timelineWanted, () => sight && open && !model.problem, (answer) => {
            model.timeline = answer.ok ? answer.json : null;
            hear("timeline");
        });

        return {
            model,
            /** Whether somebody can see the panel. */
            setSight(now) {
                if (now === sight) return;
                sight = now;
                if (sight) {
                    statusAsker.wake();
                    if (open) timelineAsker.wake();
                } else {
                    statusAsker.stop();
                    timelineAsker.stop();
                }
            },
            /** Whether the page shows a job's progress: asks at a job's start and end. */
            setJob(now) {
                if (now === job) return;
                job = now;
                if (sight) statusAsker.wake();
            },
            /** Whether the details are open, which is when the timeline is wanted. */
            setOpen(now) {
                if (now === open) return;
                open = now;
                if (open && sight) timelineAsker.wake();
                if (!open) timelineAsker.stop();
            },
            refresh() {
                statusAsker.wake();
            },
            /** Start or stop the trial. {ok, reason}. */
            async tryIt(start) {
                const options = {method: start ? "POST" : "DELETE", headers: {"X-Async-Lowvram": "1"}};
                const answer = await ours.request("trial", options);
                statusAsker.wake();
                const told = answer.json && typeof answer.json.reason === "string" ? answer.json.reason : "";
                const did = start ? answer.ok && answer.json.started === true : answer.status >= 200 && answer.status < 300;
                return {ok: did, reason: told, code: answer.status};
            },
            /** For tests: whether somebody can see it, something is on its way, a timer runs. */
            get sight() {
                return sight;
            },
            get asking() {
                return statusAsker.asking || timelineAsker.asking;
            },
            get waiting() {
                return statusAsker.waiting || timelineAsker.waiting;
            },
        };
    };
})(window.asyncLowvram);
