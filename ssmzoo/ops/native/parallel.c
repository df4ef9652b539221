#include "parallel.h"
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <stdatomic.h>

// Torch's own threads run the tasks where it has an OpenMP runtime (ssmzoo_use_team): they spin for milliseconds after
// every operator of torch, and would take half a core from threads of ours. Elsewhere, and in a forked child, which has no
// threads of OpenMP's, there is a pool. Its caller waits only for tasks that another thread has begun, so that a worker
// that the system does not schedule delays nobody.

enum { MAX_WORKERS = 255, SPINS = 2000, LATE = 500000 };  // LATE: nanoseconds

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;  // held by the caller whose job is in the pool
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int workers;                 // threads started
static int openings;                // how many workers may still join the job; guarded by lock
static _Atomic int active;          // workers inside the job
static _Atomic uint64_t generation; // number of the job
typedef struct {
    void (*body)(void *, int64_t);
    void *context;
    int64_t tasks;
    _Atomic int64_t next;
} work_list;
static work_list job;
static void (*team)(void (*body)(void *), void *context, unsigned threads, unsigned flags);  // GOMP_parallel

void ssmzoo_use_team(void *gomp_parallel) { team = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel; }

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void run_tasks(void *list) {
    work_list *w = list;
    for (int64_t i; (i = atomic_fetch_add(&w->next, 1)) < w->tasks;) w->body(w->context, i);
}

static void *worker(void *unused) {
    (void)unused;
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&generation) == seen; i++) pause_cpu();
        pthread_mutex_lock(&lock);
        while (atomic_load(&generation) == seen || openings <= 0) pthread_cond_wait(&work, &lock);
        seen = atomic_load(&generation);
        openings--;
        atomic_fetch_add(&active, 1);
        pthread_mutex_unlock(&lock);
        run_tasks(&job);
        pthread_mutex_lock(&lock);
        if (atomic_fetch_sub(&active, 1) == 1) pthread_cond_signal(&done);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static void after_fork(void) {  // the child has no workers; it starts its own when it needs them
    pthread_mutex_init(&gate, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&done, NULL);
    workers = openings = 0;
    atomic_store(&active, 0);
    team = NULL;
}

__attribute__((constructor)) static void watch_fork(void) { pthread_atfork(NULL, NULL, after_fork); }

static void start_workers(int wanted) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; workers < wanted && !pthread_create(&thread, &attributes, worker, NULL);) workers++;
    pthread_attr_destroy(&attributes);
}

void parallel_for(int64_t tasks, int64_t threads, void (*body)(void *, int64_t), void *context) {
    int64_t helpers = (threads < tasks ? threads : tasks) - 1;
    if (helpers > MAX_WORKERS) helpers = MAX_WORKERS;
    if (helpers > 0 && team) {
        work_list mine = {body, context, tasks, 0};
        team(run_tasks, &mine, (unsigned)(helpers + 1), 0);
        return;
    }
    if (helpers <= 0 || pthread_mutex_trylock(&gate)) {
        for (int64_t i = 0; i < tasks; i++) body(context, i);
        return;
    }
    pthread_mutex_lock(&lock);
    if (workers < helpers) start_workers((int)helpers);
    job.body = body, job.context = context, job.tasks = tasks;
    atomic_store(&job.next, 0);
    openings = (int)helpers;
    atomic_fetch_add(&generation, 1);
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&lock);
    run_tasks(&job);
    for (int i = 0; i < SPINS && atomic_load(&active); i++) pause_cpu();
    pthread_mutex_lock(&lock);
    openings = 0;  // who wakes up now finds the job closed
    while (atomic_load(&active)) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&gate);
}

// A task is claimed by moving the ticket, (number of the job << 32) + next task, on by one. Who comes late finds another
// job's number on it and cannot move it, so that the job's fields may be overwritten as soon as its tasks are finished.
struct crew {
    void (*program)(void *, crew *);
    void *argument;
    pthread_t caller;
    int64_t threads, ended;
    _Atomic uint64_t ticket;
    _Atomic int64_t tasks, finished;
    void (*_Atomic body)(void *, int64_t);
    void *_Atomic context;
    _Atomic int closed;
};

static void claim_tasks(crew *t, uint64_t number) {
    void (*body)(void *, int64_t) = atomic_load(&t->body);
    void *context = atomic_load(&t->context);
    const uint64_t tasks = (uint64_t)atomic_load(&t->tasks);
    for (uint64_t ticket = atomic_load(&t->ticket); ticket >> 32 == number && (ticket & UINT32_MAX) < tasks;) {
        if (!atomic_compare_exchange_weak(&t->ticket, &ticket, ticket + 1)) continue;
        body(context, (int64_t)(ticket & UINT32_MAX));
        atomic_fetch_add(&t->finished, 1);
        ticket = atomic_load(&t->ticket);
    }
}

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void wait_a_little(int64_t *spins) {  // others may need the core
    if (++*spins < SPINS) pause_cpu();
    else sched_yield();
}

static void join_crew(void *context, int64_t index) {
    crew *t = context;
    (void)index;
    if (atomic_load(&t->closed)) return;
    if (pthread_equal(pthread_self(), t->caller)) {
        t->program(t->argument, t);
        t->ended = nanoseconds();
        atomic_store(&t->closed, 1);
        return;
    }
    for (uint64_t seen = 0;;) {
        int64_t spins = 0;
        while (atomic_load(&t->ticket) >> 32 == seen && !atomic_load(&t->closed)) wait_a_little(&spins);
        if (atomic_load(&t->closed)) return;
        seen = atomic_load(&t->ticket) >> 32;
        claim_tasks(t, seen);
    }
}

// Where other programs use the cores, a thread may be taken off one in the middle of a task, and the caller waits for it for
// milliseconds, in every job anew. After such a wait it works alone for a while, longer each time.
static _Atomic int64_t alone_until, alone_for;

static int late(int64_t since) {  // whether others have been waited for that long
    const int64_t now = nanoseconds(), before = atomic_load(&alone_for);
    if (now - since < LATE) return 0;
    const int64_t next = now - atomic_load(&alone_until) > 1000000000 ? 20000000 : before < 640000000 ? 2 * before : before;
    atomic_store(&alone_for, next);
    atomic_store(&alone_until, now + next);
    return 1;
}

static void wait_for_others(crew *t, int64_t tasks) {
    for (int64_t spins = 0; spins < SPINS; spins++) {
        if (atomic_load(&t->finished) >= tasks) return;
        pause_cpu();
    }
    const int64_t start = nanoseconds();
    while (atomic_load(&t->finished) < tasks) sched_yield();
    if (late(start)) t->threads = 1;
}

void parallel_crew(int64_t threads, void (*program)(void *, crew *), void *context) {
    if (threads > 1 && nanoseconds() < atomic_load(&alone_until)) threads = 1;
    crew t = {.program = program, .argument = context, .caller = pthread_self(), .threads = threads};
    parallel_for(threads, threads, join_crew, &t);
    if (threads > 1) late(t.ended);  // or at the end, until they have left
}

int64_t crew_size(const crew *t) { return t->threads; }

void crew_for(crew *t, int64_t tasks, void (*body)(void *, int64_t), void *context) {
    if (t->threads <= 1 || tasks <= 1 || tasks > INT32_MAX) {
        for (int64_t i = 0; i < tasks; i++) body(context, i);
        return;
    }
    atomic_store(&t->body, body);
    atomic_store(&t->context, context);
    atomic_store(&t->tasks, tasks);
    atomic_store(&t->finished, 0);
    const uint64_t number = (atomic_load(&t->ticket) >> 32) + 1;
    atomic_store(&t->ticket, number << 32);
    claim_tasks(t, number);
    wait_for_others(t, tasks);
}
