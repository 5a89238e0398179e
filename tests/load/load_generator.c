// A load generator for HTTP/1.1 and server-sent events: one thread, epoll, at a rate or in a closed loop. It measures
// what a client sees and what named processes spend meanwhile, and prints one line of JSON; it never judges a result.
//
//   load_generator --port PORT --body FILE [option value]...
//     --path PATH           (/v1/chat/completions)
//     --header 'Name: x'    may be given again
//     --connections N       (1)
//     --rate N              requests a second on a fixed schedule; 0 (the default) is a closed loop: each connection
//                           sends its next request when it has the answer
//     --spread_s S          the first requests of a closed loop are spread over so long      (0)
//     --warm_s S            before the window that is measured                               (1)
//     --window_s S          the window                                                       (5)
//     --timeout_s S         after which an answer that has not ended is an error             (30)
//     --slow N              so many of the connections, the first ones, read at a trickle    (0)
//     --slow_bytes_per_s N  that is, so much                                                 (1000)
//     --count tokens|events what a chunk is: a token of the fake engine, or any event        (tokens)
//     --processes NAME=PID[:PID]...  whose CPU is read at the window's two ends and whose memory at its end; again for
//                           each NAME
//
// At a rate, latency counts from the time a request was scheduled for, whether or not a connection was free for it then
// (no coordinated omission), and the answers to what was scheduled in the window are awaited after it. Tokens of the
// fake engine hold the time they were made at, so a chunk's lag is its whole way through what lies between.
//
// A generator that has to wait for its own processor measures itself. It reads from the kernel how much of the window
// it ran and how much it waited to run ("generator_share"), and how late it sent what it could have sent in time
// ("late_ms"); "generator_limits" says that either is too much for the figures to be the target's.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    READ_BYTES = 256 << 10,
    HEAD_BYTES = 16 << 10,
    LINE_BYTES = 4096,
    SAMPLE_BYTES = 200,
    EVENTS = 512,
    GROUPS = 32,
    GROUP_PIDS = 64,
    CLOCK_DIGITS = 16,
    // What a slow reader takes at a time.
    SLOW_READ_BYTES = 256,
    SLOW_BUFFER_BYTES = 4096,
};
static const uint64_t NS_PER_MS = 1000000;
static const uint64_t NS_PER_S = 1000000000;
static const uint64_t RECONNECT_NS = 10000000;
static const uint64_t SWEEP_NS = 50000000;
// More than this, and the generator shapes what it measures.
static const double LIMIT_SHARE = 0.9;
static const double LIMIT_LATE_MS = 1.0;

// --- Settings --------------------------------------------------------------------------------------------------------

typedef struct {
    char name[64];
    int pids[GROUP_PIDS], pid_count;
    uint64_t ran_ns, waited_ns, rss_bytes;
} Group;

static struct {
    int port, connections, slow;
    double rate, spread_s, warm_s, window_s, timeout_s, slow_bytes_per_s;
    const char *path;
    bool count_events;
    char *body, *headers;
    size_t body_size;
} set = {.connections = 1,
         .warm_s = 1,
         .window_s = 5,
         .timeout_s = 30,
         .slow_bytes_per_s = 1000,
         .path = "/v1/chat/completions"};
static Group groups[GROUPS];
static int group_count;

static _Noreturn void fail(const char *what) {
    fprintf(stderr, "load_generator: %s\n", what);
    exit(2);
}

static void *checked(void *memory) {
    if (!memory) fail("out of memory");
    return memory;
}

// --- Time and samples ------------------------------------------------------------------------------------------------

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static uint64_t as_ns(double seconds) { return (uint64_t)(seconds * (double)NS_PER_S); }

static double as_s(uint64_t ns) { return (double)ns / (double)NS_PER_S; }

// Milliseconds from one moment to another; below zero when the second one was first.
static double ms_between(uint64_t from, uint64_t to) { return ((double)to - (double)from) / (double)NS_PER_MS; }

typedef struct {
    float *values;
    size_t count, capacity;
} Samples;

static void add_sample(Samples *samples, double value) {
    if (samples->count == samples->capacity) {
        samples->capacity = samples->capacity ? samples->capacity * 2 : 4096;
        samples->values = checked(realloc(samples->values, samples->capacity * sizeof *samples->values));
    }
    samples->values[samples->count++] = (float)value;
}

static int by_value(const void *left, const void *right) {
    float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

// --- What is measured ------------------------------------------------------------------------------------------------

static struct {
    Samples latency_ms, ttfb_ms, lag_ms, slow_lag_ms, late_ms;
    uint64_t requests, chunks, refused, broken, timed_out, slow_cut, bytes;
    double stall_ms;
    char sample[SAMPLE_BYTES + 1]; // the start of the first answer that was an error
} seen;
static uint64_t window_begin, window_end;
static bool measuring;

// --- Connections -----------------------------------------------------------------------------------------------------

typedef enum { CLOSED, CONNECTING, IDLE, WAITING } State;
typedef enum { SIZE_LINE, DATA, DATA_END, TRAILER } ChunkPart;

typedef struct {
    int fd;
    State state;
    bool slow, listed; // listed: stands among the idle
    uint64_t retry_at; // when a closed one connects again, or a slow one reads again
    // The request under way: when it was to be sent, and when it was.
    uint64_t scheduled, sent_at, last_chunk;
    size_t unsent;
    bool in_window;
    // Its answer so far.
    bool has_head, has_body, chunked, closes, streamed, done, failed;
    int status;
    int64_t remaining; // of the body, or of a chunk; -1: until the connection closes
    ChunkPart part;
    size_t head_size, line_size, size_line_size;
    char head[HEAD_BYTES], line[LINE_BYTES], size_line[24];
} Conn;

static int poller;
static Conn *conns, **idle;
static size_t idle_count;
static uint64_t sweep_at; // when every connection is looked at next
static char *request;
static size_t request_size;

static void on_idle(Conn *conn, uint64_t now);

static void watch(Conn *conn, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = conn};
    epoll_ctl(poller, operation, conn->fd, &event);
}

static void disconnect(Conn *conn, uint64_t retry_at) {
    close(conn->fd);
    conn->state = CLOSED;
    conn->retry_at = retry_at;
    if (retry_at < sweep_at) sweep_at = retry_at;
}

static void open_connection(Conn *conn, uint64_t now) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)set.port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1, small = SLOW_BUFFER_BYTES;
    conn->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (conn->fd < 0) fail("no socket: raise the limit of open files");
    setsockopt(conn->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (conn->slow) setsockopt(conn->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    if (connect(conn->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
        disconnect(conn, now + RECONNECT_NS);
        return;
    }
    conn->state = CONNECTING;
    watch(conn, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static bool in_window(uint64_t moment) { return moment >= window_begin && moment < window_end; }

// Counts the end of the request under way, answered or not.
static void end_request(Conn *conn, uint64_t now, bool answered) {
    bool counts = set.rate > 0 ? conn->in_window : measuring;
    bool good = answered && conn->status / 100 == 2 && !conn->failed && (!conn->streamed || conn->done);
    conn->state = IDLE;
    if (!counts) return;
    if (conn->slow) {
        // Whoever reads so slowly may be cut off; that is no error of a request.
        seen.slow_cut += !good;
    } else if (good) {
        if (measuring) seen.requests++;
        add_sample(&seen.latency_ms, ms_between(conn->scheduled, now));
    } else if (answered && conn->status / 100 != 2) {
        seen.refused++;
    } else {
        seen.broken++;
    }
}

static void send_rest(Conn *conn) {
    while (conn->unsent) {
        ssize_t count = send(conn->fd, request + request_size - conn->unsent, conn->unsent, MSG_NOSIGNAL);
        // A connection that broke shows itself when it is read.
        if (count < 0) break;
        conn->unsent -= (size_t)count;
    }
}

static void start_request(Conn *conn, uint64_t scheduled, uint64_t now) {
    conn->state = WAITING;
    conn->scheduled = scheduled;
    conn->sent_at = now;
    conn->last_chunk = 0;
    conn->in_window = in_window(scheduled);
    conn->has_head = conn->has_body = conn->chunked = conn->closes = false;
    conn->streamed = conn->done = conn->failed = false;
    conn->head_size = conn->line_size = conn->size_line_size = 0;
    conn->unsent = request_size;
    send_rest(conn);
    if (conn->unsent) watch(conn, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

// --- The answer ------------------------------------------------------------------------------------------------------

// The time since the last chunk of a stream; what lies before the window does not count.
static void note_stall(const Conn *conn, uint64_t now) {
    if (conn->slow || !conn->last_chunk) return;
    uint64_t from = conn->last_chunk > window_begin ? conn->last_chunk : window_begin;
    if (ms_between(from, now) > seen.stall_ms) seen.stall_ms = ms_between(from, now);
}

static void on_chunk(Conn *conn, uint64_t made_at, uint64_t now) {
    if (measuring) {
        seen.chunks += !conn->slow;
        note_stall(conn, now);
    }
    if (measuring && made_at) add_sample(conn->slow ? &seen.slow_lag_ms : &seen.lag_ms, ms_between(made_at, now));
    conn->last_chunk = now;
}

static void keep_sample(const char *bytes, size_t size) {
    if (!seen.sample[0]) memcpy(seen.sample, bytes, size < SAMPLE_BYTES ? size : SAMPLE_BYTES);
}

// One line of a stream of server-sent events, without its end.
static void on_line(Conn *conn, const char *line, size_t size, uint64_t now) {
    if (size < 6 || memcmp(line, "data:", 5) != 0) return;
    const char *data = line + 5, *end = line + size;
    if (*data == ' ') data++;
    if (end - data >= 6 && memcmp(data, "[DONE]", 6) == 0) {
        conn->done = true;
        return;
    }
    if (end - data >= 8 && memcmp(data, "{\"error\"", 8) == 0) {
        conn->failed = true;
        keep_sample(data, (size_t)(end - data));
        return;
    }
    if (set.count_events) {
        on_chunk(conn, 0, now);
        return;
    }
    const char *token = memmem(data, (size_t)(end - data), "\"T", 2);
    if (!token || end - token < 2 + CLOCK_DIGITS) return;
    uint64_t made_at = 0;
    for (const char *digit = token + 2; digit < token + 2 + CLOCK_DIGITS; digit++) {
        if (*digit < '0' || *digit > '9') return;
        made_at = made_at * 10 + (uint64_t)(*digit - '0');
    }
    on_chunk(conn, made_at, now);
}

// Bytes of the body. A line that arrives in pieces is put together first.
static void on_body(Conn *conn, const char *bytes, size_t size, uint64_t now) {
    if (!conn->has_body && size) {
        conn->has_body = true;
        bool counts = set.rate > 0 ? conn->in_window : measuring;
        if (counts && !conn->slow && conn->status / 100 == 2) {
            add_sample(&seen.ttfb_ms, ms_between(conn->scheduled, now));
        }
        if (conn->status / 100 != 2) keep_sample(bytes, size);
    }
    while (conn->streamed && size) {
        const char *end = memchr(bytes, '\n', size);
        size_t piece = end ? (size_t)(end - bytes) : size;
        if (end && !conn->line_size) {
            on_line(conn, bytes, piece, now);
        } else {
            // What is too long to be kept is no token of the fake engine; its beginning is enough.
            size_t room = LINE_BYTES - conn->line_size, kept = piece < room ? piece : room;
            memcpy(conn->line + conn->line_size, bytes, kept);
            conn->line_size += kept;
            if (end) {
                on_line(conn, conn->line, conn->line_size, now);
                conn->line_size = 0;
            }
        }
        if (!end) return;
        bytes += piece + 1;
        size -= piece + 1;
    }
}

static void complete(Conn *conn, uint64_t now) {
    end_request(conn, now, true);
    if (conn->closes) {
        disconnect(conn, now);
    } else {
        on_idle(conn, now);
    }
}

static bool header_has(const char *head, const char *name, const char *word) {
    const char *at = strcasestr(head, name);
    const char *end = at ? strstr(at + 2, "\r\n") : NULL;
    const char *found = at ? strcasestr(at, word) : NULL;
    return found && end && found < end;
}

// Takes bytes of the head; returns how many it took.
static size_t on_head(Conn *conn, const char *bytes, size_t size, uint64_t now) {
    size_t room = HEAD_BYTES - 1 - conn->head_size, taken = size < room ? size : room;
    size_t searched = conn->head_size > 3 ? conn->head_size - 3 : 0, before = conn->head_size;
    memcpy(conn->head + conn->head_size, bytes, taken);
    conn->head_size += taken;
    conn->head[conn->head_size] = 0;
    char *end = strstr(conn->head + searched, "\r\n\r\n");
    if (!end) {
        if (conn->head_size == HEAD_BYTES - 1) fail("an answer's head is too large");
        return taken;
    }
    taken = (size_t)(end + 4 - conn->head) - before;
    // One line end stays, so that each header has one.
    end[2] = 0;
    conn->status = conn->head_size > 12 ? atoi(conn->head + 9) : 0;
    conn->head_size = 0;
    if (conn->status / 100 == 1) return taken;
    const char *length = strcasestr(conn->head, "\r\ncontent-length:");
    conn->has_head = true;
    conn->chunked = header_has(conn->head, "\r\ntransfer-encoding:", "chunked");
    conn->streamed = header_has(conn->head, "\r\ncontent-type:", "text/event-stream");
    conn->closes = header_has(conn->head, "\r\nconnection:", "close");
    conn->remaining = length && !conn->chunked ? strtoll(length + strlen("\r\ncontent-length:"), NULL, 10) : -1;
    conn->closes |= !conn->chunked && conn->remaining < 0;
    conn->part = SIZE_LINE;
    if (conn->remaining == 0) complete(conn, now);
    return taken;
}

// Takes bytes of a body of known size, or of one that ends with the connection.
static size_t on_plain(Conn *conn, const char *bytes, size_t size, uint64_t now) {
    if (conn->remaining < 0) {
        on_body(conn, bytes, size, now);
        return size;
    }
    size_t taken = (uint64_t)conn->remaining < size ? (size_t)conn->remaining : size;
    on_body(conn, bytes, taken, now);
    conn->remaining -= (int64_t)taken;
    if (conn->remaining == 0) complete(conn, now);
    return taken;
}

// Takes bytes of a chunked body, RFC 9112 section 7.1; chunks may be split anywhere.
static size_t on_chunked(Conn *conn, const char *bytes, size_t size, uint64_t now) {
    if (conn->part == DATA) {
        size_t taken = (uint64_t)conn->remaining < size ? (size_t)conn->remaining : size;
        on_body(conn, bytes, taken, now);
        conn->remaining -= (int64_t)taken;
        if (conn->remaining == 0) conn->part = DATA_END;
        return taken;
    }
    if (*bytes != '\n') {
        if (*bytes != '\r' && conn->size_line_size < sizeof conn->size_line - 1) {
            conn->size_line[conn->size_line_size++] = *bytes;
        }
        return 1;
    }
    bool empty = conn->size_line_size == 0;
    conn->size_line[conn->size_line_size] = 0;
    conn->size_line_size = 0;
    if (conn->part == SIZE_LINE) {
        conn->remaining = strtoll(conn->size_line, NULL, 16);
        conn->part = conn->remaining ? DATA : TRAILER;
    } else if (conn->part == DATA_END) {
        conn->part = SIZE_LINE;
    } else if (empty) {
        complete(conn, now);
    }
    return 1;
}

static void on_bytes(Conn *conn, const char *bytes, size_t size, uint64_t now) {
    while (size && conn->state == WAITING) {
        size_t taken = !conn->has_head ? on_head(conn, bytes, size, now)
                       : conn->chunked ? on_chunked(conn, bytes, size, now)
                                       : on_plain(conn, bytes, size, now);
        bytes += taken;
        size -= taken;
    }
}

static void on_end(Conn *conn, uint64_t now) {
    bool was_waiting = conn->state == WAITING;
    if (was_waiting) end_request(conn, now, conn->has_head && conn->remaining < 0 && !conn->chunked);
    disconnect(conn, was_waiting ? now : now + RECONNECT_NS);
}

static void on_readable(Conn *conn) {
    static char bytes[READ_BYTES];
    ssize_t count = recv(conn->fd, bytes, conn->slow ? SLOW_READ_BYTES : sizeof bytes, 0);
    uint64_t now = now_ns();
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) {
        on_end(conn, now);
        return;
    }
    if (measuring) seen.bytes += (uint64_t)count;
    on_bytes(conn, bytes, (size_t)count, now);
    if (conn->slow && conn->state == WAITING) {
        // Not listened to until it may read on.
        conn->retry_at = now + as_ns((double)SLOW_READ_BYTES / set.slow_bytes_per_s);
        watch(conn, EPOLL_CTL_MOD, 0);
    }
}

// --- The schedule ----------------------------------------------------------------------------------------------------

static uint64_t first_due;  // when a rate begins
static uint64_t sent_count; // requests of the rate that were sent, or that closed-loop connections were let begin
static uint64_t stop_at;    // nothing is sent from then on

static uint64_t due_at(uint64_t number) { return first_due + as_ns((double)number / set.rate); }

// Requests of the window that no connection was free for yet.
static uint64_t unsent_count(void) {
    uint64_t count = 0;
    for (uint64_t number = sent_count; set.rate > 0 && due_at(number) < stop_at; number++) {
        count += in_window(due_at(number));
    }
    return count;
}

// Whether an answer to what was scheduled in the window is still to come.
static bool is_owed(void) {
    for (Conn *conn = conns; conn < conns + set.connections; conn++) {
        if (conn->state == WAITING && conn->in_window) return true;
    }
    return unsent_count() > 0;
}

// When a connection of a closed loop sends its first request.
static uint64_t begins_at(const Conn *conn) {
    return first_due + as_ns(set.spread_s * (double)(conn - conns) / set.connections);
}

// A connection has nothing to do.
static void on_idle(Conn *conn, uint64_t now) {
    conn->state = IDLE;
    if (set.rate > 0) {
        if (!conn->listed) idle[idle_count++] = conn;
        conn->listed = true;
    } else if (now < stop_at && begins_at(conn) <= now) {
        start_request(conn, now, now);
    }
}

// Sends what is due at a rate. What finds no free connection keeps its scheduled time until one is.
static void send_due(uint64_t now) {
    static bool were_busy;
    while (due_at(sent_count) <= now && due_at(sent_count) < stop_at) {
        Conn *conn = NULL;
        while (idle_count && !conn) {
            conn = idle[--idle_count];
            conn->listed = false;
            if (conn->state != IDLE) conn = NULL;
        }
        if (!conn) {
            were_busy = true;
            return;
        }
        uint64_t due = due_at(sent_count++), sent = now_ns();
        // Only what a connection was free for in time is the generator's own delay.
        if (in_window(due) && !were_busy) add_sample(&seen.late_ms, ms_between(due, sent));
        start_request(conn, due, sent);
    }
    were_busy = false;
}

// Looks at every connection: those to open, to begin, to read on, to give up.
static void sweep(uint64_t now) {
    uint64_t next = now + SWEEP_NS;
    sweep_at = next;
    for (Conn *conn = conns; conn < conns + set.connections; conn++) {
        if (conn->state == CLOSED && conn->retry_at <= now) open_connection(conn, now);
        if (conn->state == IDLE && set.rate <= 0 && now < stop_at) {
            if (begins_at(conn) <= now) {
                start_request(conn, now, now);
            } else if (begins_at(conn) < next) {
                next = begins_at(conn);
            }
        }
        if (conn->state == WAITING && conn->slow && conn->retry_at) {
            if (conn->retry_at <= now) {
                conn->retry_at = 0;
                watch(conn, EPOLL_CTL_MOD, EPOLLIN | (conn->unsent ? EPOLLOUT : 0));
            } else if (conn->retry_at < next) {
                next = conn->retry_at;
            }
        }
        if (conn->state == WAITING && !conn->slow && now > conn->sent_at + as_ns(set.timeout_s)) {
            if (set.rate > 0 ? conn->in_window : measuring) seen.timed_out++;
            disconnect(conn, now);
        }
    }
    if (next < sweep_at) sweep_at = next;
}

static void on_event(Conn *conn, uint32_t events) {
    if (conn->state == CLOSED) return;
    if (conn->state == CONNECTING) {
        if (events & (EPOLLERR | EPOLLHUP)) {
            if (measuring) seen.broken++;
            disconnect(conn, now_ns() + RECONNECT_NS);
            return;
        }
        if (!(events & EPOLLOUT)) return;
        watch(conn, EPOLL_CTL_MOD, EPOLLIN);
        on_idle(conn, now_ns());
        return;
    }
    if ((events & EPOLLOUT) && conn->unsent) {
        send_rest(conn);
        if (!conn->unsent) watch(conn, EPOLL_CTL_MOD, EPOLLIN);
    }
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(conn);
}

// --- Processes, as /proc shows them ----------------------------------------------------------------------------------

typedef struct {
    uint64_t ran_ns, waited_ns;
} Schedule;

// How long all threads of a process have run, and have waited to run (Documentation/scheduler/sched-stats).
static Schedule schedule_of(int pid) {
    Schedule total = {0, 0};
    char path[300];
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    if (!tasks) return total;
    for (struct dirent *task; (task = readdir(tasks));) {
        if (task->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/proc/%d/task/%.20s/schedstat", pid, task->d_name);
        FILE *file = fopen(path, "r");
        uint64_t ran = 0, waited = 0;
        if (file && fscanf(file, "%" SCNu64 " %" SCNu64, &ran, &waited) == 2) {
            total.ran_ns += ran;
            total.waited_ns += waited;
        }
        if (file) fclose(file);
    }
    closedir(tasks);
    return total;
}

static Schedule schedule_of_group(const Group *group) {
    Schedule total = {0, 0};
    for (int i = 0; i < group->pid_count; i++) {
        Schedule one = schedule_of(group->pids[i]);
        total.ran_ns += one.ran_ns;
        total.waited_ns += one.waited_ns;
    }
    return total;
}

static uint64_t rss_of(int pid) {
    char path[64];
    uint64_t pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", pid);
    FILE *file = fopen(path, "r");
    if (file && fscanf(file, "%*s %" SCNu64, &pages) != 1) pages = 0;
    if (file) fclose(file);
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

static Schedule own_schedule;

static void begin_window(void) {
    for (Group *group = groups; group < groups + group_count; group++) {
        Schedule before = schedule_of_group(group);
        group->ran_ns = -before.ran_ns;
        group->waited_ns = -before.waited_ns;
    }
    Schedule own = schedule_of(getpid());
    own_schedule = (Schedule){-own.ran_ns, -own.waited_ns};
    window_begin = now_ns();
    window_end = window_begin + as_ns(set.window_s);
    measuring = true;
}

static void end_window(void) {
    window_end = now_ns();
    measuring = false;
    for (Conn *conn = conns; conn < conns + set.connections; conn++) {
        if (conn->state == WAITING) note_stall(conn, window_end);
    }
    Schedule own = schedule_of(getpid());
    own_schedule.ran_ns += own.ran_ns;
    own_schedule.waited_ns += own.waited_ns;
    for (Group *group = groups; group < groups + group_count; group++) {
        Schedule after = schedule_of_group(group);
        group->ran_ns += after.ran_ns;
        group->waited_ns += after.waited_ns;
        for (int i = 0; i < group->pid_count; i++) group->rss_bytes += rss_of(group->pids[i]);
    }
}

// --- The report ------------------------------------------------------------------------------------------------------

// The value that a share of all is not above, by the nearest rank. The samples are in order.
static double percentile(const Samples *samples, double share) {
    return samples->count ? (double)samples->values[(size_t)(share * (double)(samples->count - 1) + 0.5)] : 0;
}

static void print_samples(const char *name, Samples *samples) {
    if (samples->count) qsort(samples->values, samples->count, sizeof *samples->values, by_value);
    printf(",\"%s\":{\"count\":%zu,\"p50\":%.4f,\"p95\":%.4f,\"p99\":%.4f,\"max\":%.4f}", name, samples->count,
           percentile(samples, 0.5), percentile(samples, 0.95), percentile(samples, 0.99), percentile(samples, 1));
}

static void report(void) {
    double seconds = as_s(window_end - window_begin), ran = as_s(own_schedule.ran_ns) / seconds;
    double share = ran + as_s(own_schedule.waited_ns) / seconds;
    for (char *at = seen.sample; *at; at++) {
        if (*at < ' ' || *at == '"' || *at == '\\' || *at > '~') *at = ' ';
    }
    printf("{\"window_s\":%.4f,\"requests\":%" PRIu64 ",\"chunks\":%" PRIu64 ",\"bytes\":%" PRIu64
           ",\"refused\":%" PRIu64 ",\"broken\":%" PRIu64 ",\"timed_out\":%" PRIu64 ",\"unsent\":%" PRIu64
           ",\"slow_cut\":%" PRIu64 ",\"stall_ms\":%.2f",
           seconds, seen.requests, seen.chunks, seen.bytes, seen.refused, seen.broken, seen.timed_out, unsent_count(),
           seen.slow_cut, seen.stall_ms);
    print_samples("latency_ms", &seen.latency_ms);
    print_samples("ttfb_ms", &seen.ttfb_ms);
    print_samples("lag_ms", &seen.lag_ms);
    print_samples("slow_lag_ms", &seen.slow_lag_ms);
    print_samples("late_ms", &seen.late_ms);
    printf(",\"generator_cpu\":%.4f,\"generator_share\":%.4f,\"generator_limits\":%s,\"error_sample\":\"%s\"", ran,
           share, share > LIMIT_SHARE || percentile(&seen.late_ms, 0.99) > LIMIT_LATE_MS ? "true" : "false",
           seen.sample);
    printf(",\"processes\":{");
    for (Group *group = groups; group < groups + group_count; group++) {
        printf("%s\"%s\":{\"cpu_s\":%.6f,\"waited_s\":%.6f,\"rss_bytes\":%" PRIu64 "}", group == groups ? "" : ",",
               group->name, as_s(group->ran_ns), as_s(group->waited_ns), group->rss_bytes);
    }
    printf("}}\n");
}

// --- The command line ------------------------------------------------------------------------------------------------

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "r");
    if (!file) fail("the body cannot be read");
    char *bytes = checked(malloc(4 << 20));
    *size = fread(bytes, 1, 4 << 20, file);
    fclose(file);
    return bytes;
}

static void add_group(char *text) {
    char *pids = strchr(text, '=');
    if (!pids || group_count == GROUPS) fail("--processes wants NAME=PID[:PID]..., 32 of them at most");
    Group *group = &groups[group_count++];
    *pids++ = 0;
    snprintf(group->name, sizeof group->name, "%s", text);
    for (char *pid = strtok(pids, ":"); pid && group->pid_count < GROUP_PIDS; pid = strtok(NULL, ":")) {
        group->pids[group->pid_count++] = atoi(pid);
    }
}

static void add_header(const char *text) {
    char *joined;
    if (asprintf(&joined, "%s%s\r\n", set.headers ? set.headers : "", text) < 0) fail("out of memory");
    free(set.headers);
    set.headers = joined;
}

static void read_options(int argc, char **argv) {
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i];
        if (i + 1 == argc) fail("every option wants a value");
        char *value = argv[i + 1];
        double number = atof(value);
        if (!strcmp(name, "--port")) set.port = atoi(value);
        else if (!strcmp(name, "--path")) set.path = value;
        else if (!strcmp(name, "--body")) set.body = read_file(value, &set.body_size);
        else if (!strcmp(name, "--header")) add_header(value);
        else if (!strcmp(name, "--connections")) set.connections = atoi(value);
        else if (!strcmp(name, "--rate")) set.rate = number;
        else if (!strcmp(name, "--spread_s")) set.spread_s = number;
        else if (!strcmp(name, "--warm_s")) set.warm_s = number;
        else if (!strcmp(name, "--window_s")) set.window_s = number;
        else if (!strcmp(name, "--timeout_s")) set.timeout_s = number;
        else if (!strcmp(name, "--slow")) set.slow = atoi(value);
        else if (!strcmp(name, "--slow_bytes_per_s")) set.slow_bytes_per_s = number;
        else if (!strcmp(name, "--count")) set.count_events = !strcmp(value, "events");
        else if (!strcmp(name, "--processes")) add_group(value);
        else fail("there is no such option: see the top of load_generator.c");
    }
    if (!set.port || !set.body || set.connections < 1) fail("--port, --body and at least one connection are needed");
}

static void write_request(void) {
    int size =
        asprintf(&request,
                 "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nAccept: */*\r\n"
                 "%sContent-Length: %zu\r\n\r\n%.*s",
                 set.path, set.port, set.headers ? set.headers : "", set.body_size, (int)set.body_size, set.body);
    if (size < 0) fail("out of memory");
    request_size = (size_t)size;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    // Timers fire when they are due, not up to 50 us later.
    prctl(PR_SET_TIMERSLACK, 1);
    read_options(argc, argv);
    write_request();
    poller = epoll_create1(EPOLL_CLOEXEC);
    conns = checked(calloc((size_t)set.connections, sizeof *conns));
    idle = checked(calloc((size_t)set.connections, sizeof *idle));
    uint64_t now = now_ns();
    for (int i = 0; i < set.connections; i++) conns[i].slow = i < set.slow;
    // Connections are opened before the first request is due.
    first_due = now + 100 * NS_PER_MS;
    window_begin = now + as_ns(set.warm_s);
    window_end = stop_at = window_begin + as_ns(set.window_s);
    bool over = false;
    uint64_t give_up_at = 0;
    for (;;) {
        now = now_ns();
        if (!over && !measuring && now >= window_begin) {
            begin_window();
            stop_at = window_end;
        }
        if (measuring && now >= window_end) {
            end_window();
            over = true;
            give_up_at = now + as_ns(set.timeout_s);
        }
        if (over && (set.rate <= 0 || !is_owed() || now >= give_up_at)) break;
        if (now >= sweep_at) sweep(now);
        if (set.rate > 0) send_due(now);
        uint64_t wake = over ? sweep_at : measuring ? window_end : window_begin;
        if (sweep_at < wake) wake = sweep_at;
        if (set.rate > 0 && !over && due_at(sent_count) > now && due_at(sent_count) < wake) wake = due_at(sent_count);
        now = now_ns();
        uint64_t wait = wake > now ? wake - now : 0;
        struct timespec pause = {.tv_sec = (time_t)(wait / NS_PER_S), .tv_nsec = (long)(wait % NS_PER_S)};
        struct epoll_event events[EVENTS];
        int count = epoll_pwait2(poller, events, EVENTS, &pause, NULL);
        for (int i = 0; i < count; i++) on_event(events[i].data.ptr, events[i].events);
    }
    report();
    return 0;
}
